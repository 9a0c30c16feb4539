"""Optional libraries, one file each; imported by nothing, but when it is first needed."""
