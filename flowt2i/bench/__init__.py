"""Speed and memory on this machine: `flowt2i bench`. The whole of it is `flowt2i.bench.run.bench`."""
