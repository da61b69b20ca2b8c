"""A published output in, a page in the browser of this machine out; nothing leaves the loopback interface."""
