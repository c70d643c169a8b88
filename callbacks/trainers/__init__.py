"""Attaching to training loops and trainers."""
