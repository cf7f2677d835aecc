"""What coldpress's presses keep and what its models then predict, against NVIDIA's kvpress 0.5.5: ``make parity``."""
