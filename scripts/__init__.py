"""Programs that write files of this repository from what is true elsewhere; none is part of the package."""
