"""Published experiments, run on the modelled machine: prediction beside the published value."""
