"""What a run's experts do: `moelet inspect`, and the experts' part of a run's page."""
