"""The error tree.

    BudgetlineError            a message for the user; the command line prints it and exits 2
    ├── ConfigError            a setting, flag or name is wrong
    │   └── ProfileError       … in a device profile
    ├── DataError              images cannot be used as asked
    ├── InfeasibleBudget       no architecture of the space keeps a tier's budget
    ├── BudgetMissed           a finished network was measured over its budget
    │   └── NetworkRefused     … and another can be chosen in its place
    ├── ProviderError          an execution provider cannot be opened, or is not the one asked for
    ├── MeasurementError       the machine is too disturbed to measure with the asked precision
    ├── AwaitingDevice         networks wait to be timed on a device that is not this machine
    ├── ExportError            a network could not be written as ONNX
    │   └── ParityError        … or the file does not compute what the network computes
    ├── DivergedTraining       a loss is not a number
    ├── WorkerLost             a process or node that worked for us is lost
    ├── RankLost               one of several ranks has died or does not answer
    ├── RanksDisagree          ranks that must decide the same did not
    ├── RunFolderError         the run folder cannot be used
    │   ├── RunLocked          … another process works on it
    │   ├── StaleArtifact      … a file was made from inputs that have changed
    │   └── CorruptArtifact    … a file is unreadable or not what its record says
    └── StorageError           writing failed: no space left, no permission

A message says what was wanted, what came, where (file and field), and what to do.
"""


class BudgetlineError(Exception):
    """Root of every error that is the user's to read."""


class ConfigError(BudgetlineError): ...


class ProfileError(ConfigError): ...


class DataError(BudgetlineError): ...


class InfeasibleBudget(BudgetlineError): ...


class BudgetMissed(BudgetlineError): ...


class NetworkRefused(BudgetMissed): ...


class ProviderError(BudgetlineError): ...


class MeasurementError(BudgetlineError): ...


class AwaitingDevice(BudgetlineError): ...


class ExportError(BudgetlineError): ...


class ParityError(ExportError): ...


class DivergedTraining(BudgetlineError): ...


class WorkerLost(BudgetlineError): ...


class RankLost(BudgetlineError): ...


class RanksDisagree(BudgetlineError): ...


class RunFolderError(BudgetlineError): ...


class RunLocked(RunFolderError): ...


class StaleArtifact(RunFolderError): ...


class CorruptArtifact(RunFolderError): ...


class StorageError(BudgetlineError): ...


class Ended(KeyboardInterrupt):
    """Somebody asked the process to end (SIGTERM): it stops as at Ctrl-C, in order."""
