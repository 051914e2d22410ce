-- Knex 3.3.0
-- Run: toSQL(), with the client pg, on this:
--
--   knex.schema.createTable("audit_logs", (table) => {
--     table.increments();
--     table.string("actor").notNullable();
--     table.string("action").notNullable();
--     table.timestamp("started_at").notNullable().index();
--     table.timestamp("completed_at");
--     table.enu("status", ["success", "failure", "timeout"]);
--     table.timestamps(true, true);
--   })

create table "audit_logs" ("id" serial primary key, "actor" varchar(255) not null, "action" varchar(255) not null, "started_at" timestamptz not null, "completed_at" timestamptz, "status" text check ("status" in ('success', 'failure', 'timeout')), "created_at" timestamptz not null default CURRENT_TIMESTAMP, "updated_at" timestamptz not null default CURRENT_TIMESTAMP);
create index "audit_logs_started_at_index" on "audit_logs" ("started_at");
