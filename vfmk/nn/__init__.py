"""Modules made of operators: the parameter generator and the adapter. They know tokens, not SAM."""
