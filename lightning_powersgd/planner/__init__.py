"""What PowerSGD will bring to a model, before it is trained: forecast, report and command line."""
