"""Pictures of a trained system."""
