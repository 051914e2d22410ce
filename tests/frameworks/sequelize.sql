-- Sequelize 6.37.8 with pg 8.23.1
-- Run: await sequelize.sync()
-- The model; the statements are those that sync logs, without its SELECTs:
--
--   sequelize.define("AuditLog", {
--     actor: { type: DataTypes.STRING, allowNull: false },
--     action: { type: DataTypes.STRING, allowNull: false },
--     startedAt: { type: DataTypes.DATE, allowNull: false },
--     completedAt: DataTypes.DATE,
--     status: DataTypes.ENUM("success", "failure", "timeout"),
--   }, { indexes: [{ fields: ["startedAt"] }] });

DO 'BEGIN CREATE TYPE "public"."enum_AuditLogs_status" AS ENUM(''success'', ''failure'', ''timeout''); EXCEPTION WHEN duplicate_object THEN null; END';
CREATE TABLE IF NOT EXISTS "AuditLogs" ("id"   SERIAL , "actor" VARCHAR(255) NOT NULL, "action" VARCHAR(255) NOT NULL, "startedAt" TIMESTAMP WITH TIME ZONE NOT NULL, "completedAt" TIMESTAMP WITH TIME ZONE, "status" "public"."enum_AuditLogs_status", "createdAt" TIMESTAMP WITH TIME ZONE NOT NULL, "updatedAt" TIMESTAMP WITH TIME ZONE NOT NULL, PRIMARY KEY ("id"));
CREATE INDEX "audit_logs_started_at" ON "AuditLogs" ("startedAt");
