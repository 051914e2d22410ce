-- Prisma 7.10.1
-- Command: prisma migrate diff --from-empty --to-schema schema.prisma --script
-- Run: the schema engine that is in the package prisma, its build for WebAssembly, asked for what the command asks for.
-- Left out: CREATE SCHEMA IF NOT EXISTS "public".
-- schema.prisma, without its datasource:
--
--   enum Status {
--     SUCCESS
--     FAILURE
--     TIMEOUT
--   }
--
--   model AuditLog {
--     id          Int       @id @default(autoincrement())
--     actor       String
--     action      String
--     startedAt   DateTime
--     completedAt DateTime?
--     status      Status?
--     createdAt   DateTime  @default(now())
--     updatedAt   DateTime  @updatedAt
--
--     @@index([startedAt])
--   }

-- CreateEnum
CREATE TYPE "Status" AS ENUM ('SUCCESS', 'FAILURE', 'TIMEOUT');

-- CreateTable
CREATE TABLE "AuditLog" (
    "id" SERIAL NOT NULL,
    "actor" TEXT NOT NULL,
    "action" TEXT NOT NULL,
    "startedAt" TIMESTAMP(3) NOT NULL,
    "completedAt" TIMESTAMP(3),
    "status" "Status",
    "createdAt" TIMESTAMP(3) NOT NULL DEFAULT CURRENT_TIMESTAMP,
    "updatedAt" TIMESTAMP(3) NOT NULL,

    CONSTRAINT "AuditLog_pkey" PRIMARY KEY ("id")
);

-- CreateIndex
CREATE INDEX "AuditLog_startedAt_idx" ON "AuditLog"("startedAt");
