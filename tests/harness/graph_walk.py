"""Which ops an op waits for."""


def ancestors(op):
    """All ops that must run before `op`, through data or control inputs."""
    found = set()
    pending = [op]
    while pending:
        current = pending.pop()
        sources = [tensor.op for tensor in current.inputs]
        for source in [*sources, *current.control_inputs]:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found


def ops_of_type(graph, kind):
    """All ops of `graph` of type `kind`, in the order they were made."""
    return [op for op in graph.get_operations() if op.type == kind]
