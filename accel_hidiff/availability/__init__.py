"""What optional compilers can do on this machine, found out in processes of their own."""
