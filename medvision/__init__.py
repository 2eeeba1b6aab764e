"""2D medical image segmentation and classification whose numbers can be trusted."""

__version__ = "0.1.0"
