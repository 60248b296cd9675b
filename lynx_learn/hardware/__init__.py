"""What a trace would cost on hardware that is only described: devices, chiplets, wireless helpers."""
