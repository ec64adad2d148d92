"""budgetline: from images and a device to a family of deployable networks, one per budget tier."""

__version__ = "0.1.0"
