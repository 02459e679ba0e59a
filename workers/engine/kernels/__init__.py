"""C++ kernels that are compiled for this machine when they are first needed."""
