"""How the reference implementations name and lay out the arrays of a model, a file each."""
