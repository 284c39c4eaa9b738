"""dmir: deformable medical image registration, learned and classical, compared on equal terms."""

__version__ = "0.1.0"
