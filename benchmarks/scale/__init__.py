"""Parts of the benchmarks of cold loads and of fleet size: our services as processes, a fleet that is pretended."""
