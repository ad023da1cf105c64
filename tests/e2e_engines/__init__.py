"""Engines of four kinds behind one cortex: real vLLM, llama.cpp and infinity on the CPU, and the simulation."""
