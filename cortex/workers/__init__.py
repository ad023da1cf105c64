"""Worker processes that serve clients on one shared port, and their channel to the control process, which decides for
all of them. `cortex serve` starts them through the Supervisor."""
