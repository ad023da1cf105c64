"""GPU topology and memory, from NVML or simulated, behind one interface (`topology`). Everything that needs GPU facts
calls it."""
