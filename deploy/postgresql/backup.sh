# A base backup that was verified, in a folder named after its time; PG… variables say where the server is, and who asks.
#
#     BACKUPS=/backups PGHOST=… PGUSER=… sh backup.sh
#
# Source: PostgreSQL, "pg_basebackup", "pg_verifybackup".
set -eu
: "${BACKUPS:?the folder of the base backups}"
backup="$BACKUPS/$(date -u +%Y%m%dT%H%M%SZ)"
pg_basebackup --pgdata="$backup.new" --checkpoint=fast --wal-method=stream --no-password
${VERIFY:-pg_verifybackup --quiet} "$backup.new"
mv "$backup.new" "$backup"
echo "$backup"
