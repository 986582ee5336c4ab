"""The names of OpenTelemetry's semantic conventions, and our own.

The package of the conventions, `opentelemetry-semantic-conventions`, has pre-releases
only, and requires one version of the API each. These few names are stable, so they are
written here. Those of `db.client.connection` are in development.
"""

SCHEMA_URL = "https://opentelemetry.io/schemas/1.33.0"  # with the stable names of databases
SCOPE = "sessionwire"

# Attributes
CODE_FUNCTION_NAME = "code.function.name"
DB_COLLECTION_NAME = "db.collection.name"
DB_NAMESPACE = "db.namespace"
DB_OPERATION_NAME = "db.operation.name"
DB_QUERY_SUMMARY = "db.query.summary"
DB_QUERY_TEXT = "db.query.text"
DB_RESPONSE_STATUS_CODE = "db.response.status_code"
DB_SYSTEM_NAME = "db.system.name"
ERROR_TYPE = "error.type"
POOL_NAME = "db.client.connection.pool.name"
CONNECTION_STATE = "db.client.connection.state"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"

ATTEMPT = "sessionwire.attempt"
CONNECTION_WAIT = "sessionwire.connection.wait"  # seconds
ISOLATION = "sessionwire.isolation"
OUTCOME = "sessionwire.outcome"
PROPAGATION = "sessionwire.propagation"
READ_ONLY = "sessionwire.read_only"
RETRY_REASON = "sessionwire.retry.reason"
SAVEPOINT = "sessionwire.savepoint"
SETTLED = "sessionwire.settled"
JOINED = "sessionwire.joined"  # an event

# The boundaries of the conventions, in seconds
BOUNDARIES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)

# By the names of SQLAlchemy's dialects
SYSTEMS = {
    "mariadb": "mariadb",
    "mssql": "microsoft.sql_server",
    "mysql": "mysql",
    "oracle": "oracle.db",
    "postgresql": "postgresql",
    "sqlite": "sqlite",
}
OTHER_SYSTEM = "other_sql"
