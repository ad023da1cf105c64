"""Models that take turns on too little memory."""
