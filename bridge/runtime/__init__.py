"""Everything that runs an engine: the module, its contexts and CUDA graphs, and the runner of comparisons."""
