"""The rim: everything that touches somebody else's system."""
