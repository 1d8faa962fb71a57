"""What goes wrong with a kernel on the host."""


class MetalHostError(RuntimeError):
    """Base of the errors below; says which kernel and why."""


class CompileError(MetalHostError):
    """The kernel's text is no Metal that the host's compiler understands."""


class LaunchError(MetalHostError):
    """The kernel did something that Metal leaves undefined: names the thread and the reason."""


class ScheduleError(MetalHostError, AssertionError):
    """The result depends on the order in which threads run, or on memory that nobody wrote."""
