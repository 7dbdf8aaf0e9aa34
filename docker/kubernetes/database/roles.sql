-- Roles beside the owner of the database, which have no password yet unless CloudNativePG made them.
-- As a superuser, once the service has made its tables:
--   kubectl -n pho exec -i service/pho-database-rw -c postgres -- psql pho < docker/kubernetes/database/roles.sql
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'pho_reader') THEN
        CREATE ROLE pho_reader LOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'keda') THEN
        CREATE ROLE keda LOGIN;
    END IF;
END $$;
-- Studies, and nothing else
ALTER ROLE pho_reader SET default_transaction_read_only = on;
ALTER ROLE pho_reader SET search_path = optuna;
GRANT USAGE ON SCHEMA optuna TO pho_reader;
GRANT SELECT ON ALL TABLES IN SCHEMA optuna TO pho_reader;
-- How many stages wait
ALTER ROLE keda SET default_transaction_read_only = on;
GRANT USAGE ON SCHEMA pho TO keda;
GRANT SELECT (id, state) ON pho.jobs TO keda;
GRANT SELECT (id, job_id, kind, state, params) ON pho.stages TO keda;
