"""What compression brings and what it costs: torchmetrics, and what logs them."""
