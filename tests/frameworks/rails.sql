-- Rails 8.1.3.1 (Active Record)
-- Command: bin/rails db:migrate
-- Run: Active Record's source on Ruby 3.1 and pg 1.4.5, with Thread.each_caller_location added, without bin/rails.
-- The migration:
--
--   class CreateAuditLogs < ActiveRecord::Migration[8.1]
--     def change
--       create_table :audit_logs do |t|
--         t.string :actor, null: false
--         t.string :action, null: false
--         t.datetime :started_at, null: false
--         t.datetime :completed_at
--         t.string :status
--
--         t.timestamps
--       end
--       add_index :audit_logs, :started_at
--     end
--   end

CREATE TABLE "audit_logs" ("id" bigserial primary key, "actor" character varying NOT NULL, "action" character varying NOT NULL, "started_at" timestamp(6) NOT NULL, "completed_at" timestamp(6), "status" character varying, "created_at" timestamp(6) NOT NULL, "updated_at" timestamp(6) NOT NULL);
CREATE INDEX "index_audit_logs_on_started_at" ON "audit_logs" ("started_at");
