"""From outcomes to figures and tables."""
