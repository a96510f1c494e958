"""The commands behind `python -m secant`, one module each."""
