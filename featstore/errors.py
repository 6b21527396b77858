"""Every error that a user can cause or meet, as one tree.

    FeatstoreError                 exit 1
    ├── UsageError                 exit 2   the command line or a setting is wrong
    │   └── ConfigError            exit 2   featstore.toml: unknown key, wrong type, bad value
    ├── DataError                  exit 1   the user's rows, photos or splits
    │   ├── RowError               exit 1   a row file that cannot be read
    │   ├── SplitError             exit 1   a split that leaks or belongs to other rows
    │   └── ImageError             exit 1   one photo that cannot be decoded
    ├── PresetError                exit 1   an encoder that cannot be loaded or cut
    ├── StoreError                 exit 1   the feature store
    │   ├── MissingFeaturesError   exit 1   features that were never extracted
    │   ├── StaleFeaturesError     exit 1   features of another spec
    │   └── CorruptShardError      exit 1   a shard that is not what was published
    ├── RunError                   exit 1   a run folder that cannot be used
    └── StoppedError               exit 130 the user asked to stop; what was done is kept

A message is one line: what failed, where, what was expected, what was found,
and the command that mends it.
"""


class FeatstoreError(Exception):
    """Base of every error that is reported as one line instead of a traceback."""

    exit_code = 1


class UsageError(FeatstoreError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class DataError(FeatstoreError):
    pass


class RowError(DataError):
    pass


class SplitError(DataError):
    pass


class ImageError(DataError):
    pass


class PresetError(FeatstoreError):
    pass


class StoreError(FeatstoreError):
    pass


class MissingFeaturesError(StoreError):
    pass


class StaleFeaturesError(StoreError):
    pass


class CorruptShardError(StoreError):
    pass


class RunError(FeatstoreError):
    pass


class StoppedError(FeatstoreError):
    exit_code = 130
