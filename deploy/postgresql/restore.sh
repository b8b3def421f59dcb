# Makes the folder of a server that will recover to a moment, and will wait for `payouts recover` then. It does not start it.
#
#     BACKUP=/backups/… ARCHIVE=/archive PGDATA=… TARGET='2026-05-01 12:00:00+00' sh restore.sh
#
# BACKUP must be older than TARGET; without TARGET the server recovers to the end of the archive. As the server's account.
# Source: PostgreSQL, "Recovering Using a Continuous Archive Backup".
set -eu
: "${BACKUP:?a base backup}" "${ARCHIVE:?the folder of the archive}" "${PGDATA:?the folder of the new server}"
if [ -n "$(ls -A "$PGDATA" 2>/dev/null || true)" ]; then
  echo "$PGDATA is not empty" >&2
  exit 1
fi
mkdir -p "$PGDATA"
cp -a "$BACKUP/." "$PGDATA/"
chmod 700 "$PGDATA"
rm -f "$PGDATA/standby.signal"
touch "$PGDATA/recovery.signal"
# The last word in this file counts, so that nothing of the server before is left.
cat >> "$PGDATA/postgresql.auto.conf" <<END
restore_command = 'cp "$ARCHIVE/%f" "%p"'
recovery_target_time = '${TARGET:-}'
recovery_target_action = 'promote'
payouts.restored = '${TARGET:-the end of the archive}, restored $(date -u +%Y-%m-%dT%H:%M:%SZ)'
END
