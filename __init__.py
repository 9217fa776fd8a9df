"""mien: the fastest, safest trainer of face-swap autoencoders on Nvidia hardware."""

__version__ = "0.1.0"
