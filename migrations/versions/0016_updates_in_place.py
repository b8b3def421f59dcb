"""A payout's changes stay on the page of its row, and locking accounts and moving them is planned once.

A payout and an attempt change soon after they were written, and none of the columns that change is in an index: so the new row
may stay beside the old one and leave the indexes alone (PostgreSQL, "Heap-Only Tuples"), if there is room for it. A page that
is filled by less than half always has it, since the next change of a row clears away the one before; what took that room until
now were copies on other pages. Pages that are there already are as full as they were.

That an attempt is finished was in an index, which kept two from being open. A guard does so now, whoever comes at the same
time: of two attempts with the same number the key refuses one, and one with the next number is refused until the attempt before
it is committed (`payout_attempts_submit_once`). So whoever adds an attempt sees all that came before it; those stay, under
their numbers, and nobody opens one again.

Statements that have parameters, a function's variables among them, are planned at each call otherwise.

Old code runs on it. No table is read or written anew, however much is in it: the migration waits for those that are writing
attempts, and whoever comes meanwhile waits for it.
"""

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

ROW_BY_ROW = ("enable_hashjoin", "enable_mergejoin", "enable_material", "enable_seqscan")

GUARDS = [
    # Whoever has read of it and is about to write is waited for here.
    "LOCK TABLE payout_attempts IN ACCESS EXCLUSIVE MODE",
    f"""
    CREATE FUNCTION payout_attempts_one_open_per_payout() RETURNS trigger
      LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
      {" ".join(f"SET {way} = off" for way in ROW_BY_ROW)} AS $$
    BEGIN
      IF EXISTS (
        SELECT 1 FROM fresh f WHERE f.finished_at IS NULL AND f.attempt_no > 1 AND EXISTS (
          SELECT 1 FROM payout_attempts other
           WHERE other.payout_id = f.payout_id AND other.shop_id IS NOT DISTINCT FROM f.shop_id
             AND other.attempt_no <> f.attempt_no AND other.finished_at IS NULL OFFSET 0)) THEN
        RAISE EXCEPTION USING ERRCODE = '23505', CONSTRAINT = TG_NAME, TABLE = TG_TABLE_NAME,
          MESSAGE = 'a payout has one attempt under way';
      END IF;
      RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER payout_attempts_one_open_per_payout AFTER INSERT ON payout_attempts REFERENCING NEW TABLE AS fresh
      FOR EACH STATEMENT EXECUTE FUNCTION payout_attempts_one_open_per_payout()
    """,
    "REVOKE ALL ON FUNCTION payout_attempts_one_open_per_payout() FROM PUBLIC",
    """
    CREATE TRIGGER payout_attempts_stay BEFORE UPDATE OF payout_id, shop_id, attempt_no OR DELETE ON payout_attempts
      FOR EACH ROW EXECUTE FUNCTION refuse_change()
    """,
    "DROP INDEX payout_attempts_one_open_per_payout",
]

ROOM = [f"ALTER TABLE {table} SET (fillfactor = 45)" for table in ("payouts", "payout_attempts")]

PLANNED_ONCE = [
    *(
        f"ALTER FUNCTION {name} SET plan_cache_mode TO force_generic_plan"
        for name in ("lock_accounts(bigint[], integer)", "entries_move_accounts()")
    ),
    # So that the one plan does for however many accounts there will be.
    *(f"ALTER FUNCTION lock_accounts(bigint[], integer) SET {way} TO off" for way in ROW_BY_ROW),
]


def upgrade() -> None:
    """Change them; what others wait for comes last."""
    for statement in PLANNED_ONCE + ROOM + GUARDS:
        op.execute(statement)
