-- A login for each process of the product, each a member of the one role that it takes, two for people with more to do, one for
-- backups and standbys, and a database of their own.
--
-- Once, by a superuser, in the product's database, before the first `payouts migrate`:
--
--     createdb payouts
--     MIGRATE_PASSWORD=… GATEWAY_PASSWORD=… WORKER_PASSWORD=… OPS_PASSWORD=… CUSTODIAN_PASSWORD=… BACKUP_PASSWORD=… \
--       psql --file logins.sql payouts
--
-- Again, with other passwords, it changes them. psql 14 or newer. Source: PostgreSQL, "Role Membership", "Predefined Roles".

\set ON_ERROR_STOP on
SET client_min_messages = warning;
\getenv migrate_password MIGRATE_PASSWORD
\getenv gateway_password GATEWAY_PASSWORD
\getenv worker_password WORKER_PASSWORD
\getenv ops_password OPS_PASSWORD
\getenv custodian_password CUSTODIAN_PASSWORD
\getenv backup_password BACKUP_PASSWORD

-- The roles that hold rights, which nobody logs in as; `payouts migrate` gives them their rights.
SELECT format('CREATE ROLE %I NOLOGIN', name)
  FROM unnest(ARRAY['payouts_owner', 'payouts_gateway', 'payouts_worker', 'payouts_ops', 'payouts_readonly',
                    'payouts_sealer']) AS name
 WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec

SELECT format('CREATE ROLE %I LOGIN', name)
  FROM unnest(ARRAY['payouts-migrate', 'payouts-gateway', 'payouts-worker', 'payouts-ops', 'payouts-custodian',
                    'payouts-backup']) AS name
 WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec

ALTER ROLE "payouts-migrate" PASSWORD :'migrate_password';
ALTER ROLE "payouts-gateway" PASSWORD :'gateway_password';
ALTER ROLE "payouts-worker" PASSWORD :'worker_password';
ALTER ROLE "payouts-ops" PASSWORD :'ops_password';
ALTER ROLE "payouts-custodian" PASSWORD :'custodian_password';
-- It reads every file of the server, and nothing by way of SQL.
ALTER ROLE "payouts-backup" REPLICATION PASSWORD :'backup_password';

GRANT payouts_owner, payouts_gateway, payouts_worker, payouts_ops, payouts_readonly, payouts_sealer TO "payouts-migrate";
GRANT payouts_gateway TO "payouts-gateway";
GRANT payouts_worker TO "payouts-worker";
GRANT payouts_ops, payouts_readonly TO "payouts-ops";
-- Who holds the keys: it reads what is sealed, seals it anew, and is audited.
GRANT payouts_worker, payouts_ops, payouts_sealer TO "payouts-custodian";
-- The runbook's psql sees what the sessions of others do, and ends those that stand in the way; a superuser's it cannot end.
GRANT pg_read_all_stats, pg_signal_backend TO "payouts-migrate";

-- The schema is made by the login that owns the database, and nobody else comes in.
ALTER DATABASE :"DBNAME" OWNER TO "payouts-migrate";
REVOKE ALL ON DATABASE :"DBNAME" FROM PUBLIC;
GRANT CONNECT ON DATABASE :"DBNAME" TO "payouts-gateway", "payouts-worker", "payouts-ops", "payouts-custodian";
