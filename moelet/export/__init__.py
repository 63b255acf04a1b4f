"""A run's model in the formats of others, and back."""
