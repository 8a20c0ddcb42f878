"""The guide's front door: ``web.serve``."""
