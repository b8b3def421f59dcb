# Puts one file of write-ahead log into the archive, whole or not at all, and never replaces one by another:
#
#     archive_command = 'ARCHIVE=/archive sh /etc/postgresql/archive.sh "%p" "%f"'
#
# Source: PostgreSQL, "Setting Up WAL Archiving".
set -eu
: "${ARCHIVE:?the folder of the archive}"
kept="$ARCHIVE/$2"
# What a server that crashed had archived already, it archives again.
if [ -e "$kept" ]; then
  exec cmp "$1" "$kept"
fi
cp "$1" "$kept.new"
sync "$kept.new"
mv "$kept.new" "$kept"
sync "$ARCHIVE"
