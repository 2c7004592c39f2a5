"""Generation: a fixed-size cache, one prefill, one compiled decode loop."""
