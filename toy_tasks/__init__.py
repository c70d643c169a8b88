"""Small models and tasks whose training has transitions."""
