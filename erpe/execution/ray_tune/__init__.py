"""Run trials on Ray Tune. The only package that knows Ray."""
