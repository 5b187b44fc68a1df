"""omnistore."""
