"""Neural networks that several algorithms share; a network that only one algorithm uses is defined in that algorithm's file."""
