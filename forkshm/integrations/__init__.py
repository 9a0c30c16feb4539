"""Optional libraries, one file each. Each is imported only when it is first needed."""
