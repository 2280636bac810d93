"""What there is to see of a trained system: each picture is a function from a system to a figure."""
