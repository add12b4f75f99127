"""The one place that knows Neuron. Written from AWS's documents; none of it has run on Neuron hardware."""
